"""Where an update is used: a frozen layer with its updates, the product with it, and what backward makes again."""
