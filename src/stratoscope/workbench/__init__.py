"""A local page on which a prompt is typed, seen, clicked at and changed: `stratoscope serve`."""
