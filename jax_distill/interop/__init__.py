"""PyTorch in and out: key tables and the file layouts of other projects."""
