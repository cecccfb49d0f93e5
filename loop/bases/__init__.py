"""Bases for machines without a model hub: fetched from elsewhere and converted once.

Each module here is run by `./launch.sh setup`. Nothing else imports one.
"""
