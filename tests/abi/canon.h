#include <type_traits>

// Both sides have opaque handles of their own: a pointer to any class counts as void *, to a pointer to one as void **.
template <class T> struct canon {
    using type = T;
};
template <class T>
    requires std::is_class_v<T>
struct canon<T *> {
    using type = void *;
};
template <class T>
    requires std::is_class_v<T>
struct canon<T **> {
    using type = void **;
};
template <class R, class... A> struct canon<R (*)(A...)> {
    using type = typename canon<R>::type (*)(typename canon<A>::type...);
};
template <class R, class... A> struct canon<R (*)(A...) noexcept> : canon<R (*)(A...)> {
};
