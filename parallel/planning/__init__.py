"""Programs for devices that are not there: what they need, and how fast they can be."""
