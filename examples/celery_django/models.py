"""What the tasks write."""

from django.db import models


class Order(models.Model):
    """Something that was bought."""

    article = models.CharField(max_length=50, unique=True)
    pieces = models.IntegerField()
    cents = models.IntegerField()


class Report(models.Model):
    """What all orders were worth at some time; the schedule writes one each second."""

    cents = models.IntegerField()
    written = models.DateTimeField(auto_now_add=True)
