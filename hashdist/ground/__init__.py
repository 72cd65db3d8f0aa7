"""Words that everything uses: errors, ids, settings, schema, progress.

Imports nothing of ours; no torch, ray, numba or boto3.
"""
