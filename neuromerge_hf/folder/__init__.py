"""What a merged model's folder holds beside its weights, as data: recipe, report, results, and what its parents say."""
