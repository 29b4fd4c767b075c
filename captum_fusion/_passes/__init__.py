"""How samples go through a network: one pass that reads the layers, then passes on masked or replaced samples."""
