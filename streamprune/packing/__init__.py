"""pack and unpack: sparse checkpoints as nonzeros and bitmasks, and back."""
