"""A trained model and what is done with it: predictions, features, scores, figures."""
