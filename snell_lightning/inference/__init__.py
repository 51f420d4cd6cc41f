"""After training: classify images with a tuned model, and write it for other software."""

from snell_lightning.inference.classifier import Classifier, Prediction, load_classifier

__all__ = ["Classifier", "Prediction", "load_classifier"]
