"""What is wrong with the data, as data: copies, leakage, label conflicts, shortcuts. Reporting writes it up."""
