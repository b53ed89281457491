"""From a CSV to a merged model with the command line alone, as a terminal shows it: python -m transcript"""
