"""Tasks of the shop app, found by autodiscovery."""

from __future__ import annotations

from celery import shared_task
from django.db.models import F, Sum

from examples.celery_django.models import Order, Report


@shared_task
def order(article: str, pieces: int, cents: int) -> int:
    """Write an order and return its key."""
    return int(Order.objects.create(article=article, pieces=pieces, cents=cents).pk)


@shared_task
def turnover() -> int:
    """Return what all orders are worth."""
    found = Order.objects.aggregate(sum=Sum(F("pieces") * F("cents")))
    return int(found["sum"] or 0)


@shared_task
def report() -> None:
    """Write the turnover down."""
    Report.objects.create(cents=turnover())
