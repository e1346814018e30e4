"""What every report shows: methods compared with intervals, and pictures and small tables of trained runs."""
