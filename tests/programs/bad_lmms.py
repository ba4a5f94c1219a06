"""Rows of the table of bad input: the programs that read what lmms-eval and its adapter wrote."""
from bad_files import of

from evaluation.lmms import compare, cost, loopback_judge, table

LMMS = [
    ("a run that is not there", of(table, "nowhere"), "nowhere is no folder"),
    ("a run without a record", of(table, "."), "has no kept.jsonl", "record="),
    ("one run to compare", of(compare, "."), "RUN"),
    ("two runs to compare without records", of(compare, ".", "."), "has no kept.jsonl"),
    ("a size that is none", of(table, ".", "--size", "7B"), "--size", "11B"),
    ("a GPU without speed", of(cost, "--tflops", "0"), "--tflops", "above 0"),
    ("a GPU of no number", of(cost, "--memory-share", "nan"), "--memory-share", "above 0"),
    ("a table that is none", of(cost, "--table", "2"), "--table"),
    ("a port beyond all", of(loopback_judge, "--port", "65536"), "--port is 65536", "0 to 65535")]
