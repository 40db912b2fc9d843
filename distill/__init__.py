"""Objectives that need a teacher or a critic; each file one Method of the one training loop."""
