"""Hessian products and spectra, and what a Gaussian approximation predicts from them."""
