"""How the embedded base model was made: ``python -m clipft.demo.pretrain`` (about an hour a run on 2 cores)."""
