"""How the embedded base model was made: ``python -m clipft.demo.pretrain`` (about an hour on 2 cores)."""
