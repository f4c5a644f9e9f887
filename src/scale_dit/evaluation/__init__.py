"""Measuring pictures: metrics, the runner that compares arms, and the table of quoted figures."""
