"""Small models by kind of network; `support.model_list` has them all."""
