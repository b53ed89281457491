"""From a CSV to a merged model with the command line alone, as it looks: python -m transcript"""
