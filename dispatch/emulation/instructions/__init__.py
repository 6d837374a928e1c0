"""What each instruction does: tables by family, and the decoder that searches them."""
