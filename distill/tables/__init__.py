"""Tables: named rows from JSONL, CSV, TSV, TXT, Parquet, Hub data sets and lists, and what is wrong with row 1,234.

A cell is checked where it is read, and one that cannot be used is named as an editor shows it: file, line, column. What is no
text (null, number, NaN, NUL, a lone surrogate, broken UTF-8) is a DataError, because it says that the file is not what its
owner thinks.
"""
