"""What `tools/bench` is made of.

__main__    options, turns, JSON         workloads    what the guest does
measure     one migration                baresocket   the limit of the machine; barefile for files
process     processor time and memory    report       ratios and the table
plot        the same as an SVG
"""
