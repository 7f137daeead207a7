class AckWindow:
    acked_prefix: int
