"""The project's one app."""

from django.apps import AppConfig


class ShopConfig(AppConfig):
    """Its models and tasks are in this package."""

    name = "examples.celery_django"
    label = "shop"
