"""Resumable output: solved weights and the records that a later run goes on from.

It may import what engine/ may. It never solves anything, and nothing that stands in a journal can make it read or write
outside its private folder.
"""
