"""Mixed precision: every layer of a model on a number format of its own, within a budget of bytes or of loss.

It may import what tuning/ may. It never makes a model otherwise than as a trial: predictions order the mixes and say
where to look, but what is chosen has been measured.
"""
