"""From a `QuantizedTensor` to the nodes that run it: one file per target."""
