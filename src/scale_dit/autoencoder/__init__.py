"""Latents to pictures and back, at any size: whole, streamed in bands of rows (exact), or in tiles (cheaper)."""

from scale_dit.autoencoder.decoding import MODES, Decoding, decode, decode_bands, encode
from scale_dit.autoencoder.pixels import integer_bands

__all__ = ["MODES", "Decoding", "decode", "decode_bands", "encode", "integer_bands"]
