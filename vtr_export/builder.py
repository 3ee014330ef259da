"""Artifact to a published engine folder: every step of a build, in order."""
