"""The `openmimo` command; `main.py` names its verbs."""
