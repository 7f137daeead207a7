"""From a message to its outcome, in the child: decode, run, report. The mirror of ``sending``."""
