"""The files of a merged model beside its weights: recipe, report, results, and metadata of its parents."""
