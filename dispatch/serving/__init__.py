"""The demo of attn_dispatch: a small trained decoder that adds numbers, and its tokenizer."""
