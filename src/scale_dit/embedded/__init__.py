"""The embedded tiny base: a FLUX that is small enough to ship and to train on one GPU in minutes."""
