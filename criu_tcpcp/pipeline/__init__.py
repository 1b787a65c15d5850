"""CRIU's images as other programs keep them: archives of container engines."""
