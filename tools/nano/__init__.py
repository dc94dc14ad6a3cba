"""Helpers of ``tools/train_nano.py``: data, tokenizer ranks, torch model, export."""
