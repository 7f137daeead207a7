# cython: language_level=3
"""What every call of a Celery task needs, compiled: the fields of its request, and its places on Celery's stacks. No I/O.

Sources: celery.worker.request (which fields), celery.app.task (how a Context reads them), celery.utils.threads.
"""

from fastq.wire.call cimport Call

from celery.app.task import Context

#: Attributes of a request that Celery knows; whatever else a message's headers hold is the user's.
cdef frozenset KNOWN = frozenset(Context.__dict__) | {"lang", "task", "argsrepr", "kwargsrepr", "compression"}

cdef object new_context = Context.__new__


def request_fields(Call call not None, args, kwargs, dict embed not None, str hostname, bint is_amqp) -> dict:
    """Return the fields of a task's request, as Celery's worker hands them to its tracer.

    ``embed`` is the message's third part. Without AMQP properties have the form that kombu's virtual transports give them.
    """
    cdef dict properties = call.properties()
    cdef dict headers = properties.pop("headers", None) or {}
    cdef dict fields = headers.copy()
    cdef dict delivery_info = {
        "exchange": call.exchange,
        "routing_key": call.routing_key,
        "priority": properties.get("priority"),
        "redelivered": call.redelivered,
    }
    if is_amqp:
        properties["application_headers"] = headers
    else:
        make_virtual(properties, call, headers)
    if type(fields.get("retries")) is str:
        fields["retries"] = call.retries
    limits = fields.get("timelimit")
    if type(limits) is list and str in map(type, <list> limits):
        # Clients that are loose about types; what is no number was refused. In what follows a call nobody has looked.
        fields["timelimit"] = [float(limit) if type(limit) is str else limit for limit in <list> limits]
    fields.update(embed)
    fields["properties"] = properties
    fields["reply_to"] = properties.get("reply_to")
    fields["correlation_id"] = properties.get("correlation_id")
    fields["hostname"] = hostname
    fields["delivery_info"] = delivery_info
    fields["args"] = args
    fields["kwargs"] = kwargs
    fields["is_eager"] = False
    return fields


cdef int make_virtual(dict properties, Call call, dict headers) except -1:
    """Give properties the form that kombu's transports without AMQP have, for those who look."""
    properties.pop("content_type", None)
    properties.pop("content_encoding", None)
    properties["body_encoding"] = "base64"
    properties["delivery_info"] = {"exchange": call.exchange, "routing_key": call.routing_key}
    properties["delivery_tag"] = None
    origin = headers.get("origin")
    if origin is not None:
        properties["origin"] = origin
    return 0


def to_context(dict fields not None) -> Context:
    """Return ``Context(fields, called_directly=False)`` without the detours of making it: the fields become its own."""
    cdef dict headers = None
    request = new_context(Context)
    fields["called_directly"] = False
    limits = fields.get("timelimit")
    if limits is not None:
        if isinstance(limits, (list, tuple)) and len(limits) >= 2:
            fields["time_limit"], fields["soft_time_limit"] = limits[0], limits[1]
        else:
            fields["time_limit"] = fields["soft_time_limit"] = None
    if fields.get("headers") is None:
        for key in fields:
            if key not in KNOWN:
                if headers is None:
                    headers = {}
                headers[key] = fields[key]
        fields["headers"] = headers
    request.__dict__ = fields
    return request


cdef class Stack:
    """One of Celery's stacks, entered and left as by its own ``push`` and ``pop``, at a tenth of their cost."""

    cdef dict storage
    cdef object ident

    def __init__(self, local not None):
        self.storage = local.__storage__
        self.ident = local.__ident_func__

    def __len__(self) -> int:
        cdef dict own = self.storage.get(self.ident())
        return 0 if own is None else len(own.get("stack") or ())

    def push(self, value) -> None:
        """Put a value on top."""
        cdef dict own = self.storage.get(ident := self.ident())
        cdef list stack = None if own is None else own.get("stack")
        if stack is not None:
            stack.append(value)
        elif own is not None:
            own["stack"] = [value]
        else:
            self.storage[ident] = {"stack": [value]}

    def pop(self) -> None:
        """Take the value on top away; the last one takes the stack with it."""
        cdef dict own = self.storage.get(ident := self.ident())
        cdef list stack = None if own is None else own.get("stack")
        if stack is None:
            return
        if len(stack) == 1:
            del self.storage[ident]
        else:
            stack.pop()


def faster(stack):
    """Return an object with the stack's ``push`` and ``pop``: ours where it is of Celery's usual kind, else itself."""
    local = getattr(stack, "_local", None)
    if type(stack).__module__ != "celery.utils.threads" or type(getattr(local, "__storage__", None)) is not dict:
        return stack
    return Stack(local)
