"""Collectives as data: schedules of messages, their proof and text form; outlines, their closed and folded time."""
