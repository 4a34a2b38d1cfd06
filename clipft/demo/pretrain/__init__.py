"""How the embedded base model was made: ``python -m clipft.demo.pretrain`` (15 minutes on one H200)."""
