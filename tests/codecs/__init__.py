"""Serializers and compression."""
