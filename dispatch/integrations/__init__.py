"""What attn-dispatch does with the models of other libraries, which are imported on use."""
