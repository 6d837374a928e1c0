"""FLASHMLA: DeepSeek's kernels for multi-head latent attention."""
