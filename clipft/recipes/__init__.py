"""What a user does, whole: each verb of the command line as a function."""
