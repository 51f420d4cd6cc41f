"""After training: classify images with a tuned model, and write it for other software."""
