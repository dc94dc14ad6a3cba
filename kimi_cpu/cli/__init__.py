"""The command line: one file a verb; `main.py` imports them only when they are called."""
