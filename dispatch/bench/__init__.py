"""What `attn-dispatch bench` is made of: cases, inputs, an oracle, clocks, peers, reports."""
