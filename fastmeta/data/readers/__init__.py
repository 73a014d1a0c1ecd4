"""Readers of images: folders, tables and archives, in files as users and hubs have them."""
