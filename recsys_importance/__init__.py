"""How much each training sample matters to a BERT-class model, and training that uses it."""

__version__ = "0.1.0"
