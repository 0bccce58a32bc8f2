"""What the tables of docs/evidence are made of: rows, measures, statistics, claims and the report."""
